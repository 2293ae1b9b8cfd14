"""lazyapp: A Flower / laqjax app."""
