"""What a run is told: every section of a config, and YAML and `--set` read into them.

Here live names, types, ranges and what they may not be together; no torch, no files but YAML.
"""
