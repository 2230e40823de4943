"""What `gptlite eval` measures of a trained model, and how sure that is.

It is handed a model and batches; it knows no run directories and writes nothing.
"""
