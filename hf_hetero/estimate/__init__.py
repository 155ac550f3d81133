"""The room of estimates: a cost model without a measurement."""
