"""What the operator and the programs that it starts say to each other."""
