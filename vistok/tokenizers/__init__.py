"""Visual tokenizers: one file, one model. A module with ``Config`` and ``build`` is found by its name."""
