"""An HTTP service and a page over runs: complete texts, watch training, see dropout.

Reads run directories and writes nothing into them.
"""
