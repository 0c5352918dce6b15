"""Child processes that can be limited and killed, and the messages between them and their parent."""
