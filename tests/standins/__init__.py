"""Small models written for the tests, with the module structure and call conventions of each family of models."""
