"""One run from what is asked for to its summary, and the directory that it leaves behind.

Whatever concerns several runs, or pages about them, lives above.
"""
