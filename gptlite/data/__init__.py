"""Text into token files, and token files into batches. A batch is a function of (seed, step).

Nothing here knows of models, runs or torch.
"""
