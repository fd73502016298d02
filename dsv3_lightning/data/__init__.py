"""Text to packed samples: documents, tokenizer, token files, packing, order, and the Lightning data module.

Nothing here depends on the model. Read in the order corpus, tokenizer, store, build, prepare (text to token files,
without torch), then packing, sampling, dataset, module (token files to batches).
"""
