"""How fast, how large and how faithful the influence engine is, beside floors and other engines (`cropi bench`)."""
