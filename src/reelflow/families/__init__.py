"""One file of data per published system: the only place that knows brand names."""
