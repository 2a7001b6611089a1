"""A pytest plugin with fixtures for plugin authors."""
