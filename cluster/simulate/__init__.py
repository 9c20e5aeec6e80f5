"""A discrete-event simulator of a cluster, driven by the router that serves: what is planned is what runs."""
