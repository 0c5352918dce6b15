"""HTTP and Ray; the only package that knows either."""
