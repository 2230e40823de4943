"""The commands: arguments in, one call out. Whatever is slow to load is imported inside."""
