"""A model of what speculation gives on many GPUs, from measured times of calls, drafts and messages."""
