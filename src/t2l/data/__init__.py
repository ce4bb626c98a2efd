"""Data: fetching and packing, checking, describing, and the overlap measures. Needs the extra `data`."""
