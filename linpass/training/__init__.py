"""Training a causal Linformer with ``transformers.Trainer``: arguments, data, callbacks, baselines, the run itself."""
