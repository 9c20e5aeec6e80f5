"""Redis: the embedded server, the client, the keys and the scripts that decide."""
