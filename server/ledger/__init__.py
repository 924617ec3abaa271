"""What was used: a line for each request in a database, and what is asked of it."""
