"""What is judged of content, whatever source it is from: which files are wanted, their names, their sums, and what is in them."""
