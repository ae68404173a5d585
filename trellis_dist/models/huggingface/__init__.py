"""A language model of this package as `transformers` knows models; nothing is imported until asked for.

folder.py     what an exported folder holds besides weights; needs no transformers
config.py     the configuration       modeling.py   the model, registered with the Auto classes
cache.py      what `generate` carries from token to token

The tokenizer is in data_pipeline/huggingface.py, which registers everything with the Auto classes.
"""
