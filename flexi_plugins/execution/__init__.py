"""The engine: one sweep runs any number of plans over the same tokens, each distinct block once."""
