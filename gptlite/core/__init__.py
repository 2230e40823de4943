"""The model, its dropout and masks, training, evaluating and generating: it stands alone.

Nothing here knows of run directories, other projects' formats or what is printed.
"""
