"""Pure decisions: from models, frozen observations and `now` to desired objects and status. No I/O, clock or await in here."""
