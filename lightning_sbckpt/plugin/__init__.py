"""The Lightning side: the callback, and everything that knows a Trainer."""
