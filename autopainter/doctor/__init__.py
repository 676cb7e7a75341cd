"""The doctor: looks at a machine, a storage, a data set and a Ray cluster before time is spent on them."""
