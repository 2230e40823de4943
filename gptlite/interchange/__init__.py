"""Other projects' models, tokenizers and configs, in and out of ours.

Translation between formats only; what is made of a translation is for `runs`.
"""
