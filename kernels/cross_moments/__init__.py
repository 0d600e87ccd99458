"""Mean and variance over the rows of y of the products with the rows of x, which are never stored."""
