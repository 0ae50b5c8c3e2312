"""Loading: from the sound checkpoint into live objects."""
