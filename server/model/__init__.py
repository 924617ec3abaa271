"""The Hugging Face definition of the base, made delta-aware.

Modules of ours replace its linears, embeddings and norms: base result, then deltas. They are
installed on module instances by `server.model.base`; the definition around them stays untouched.
`server.model.context` says which rows belong to which slot in a step.
"""
