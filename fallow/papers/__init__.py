"""Papers that one command reproduces: each a package of experiments as data, and what runs them."""
