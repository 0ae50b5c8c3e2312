"""A save, from the live state to a published folder: at once, in the background, or hidden."""
