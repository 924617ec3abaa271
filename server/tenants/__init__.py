"""Who calls, and what they may use: tenants, their keys, rights and limits."""
