"""One decode step of attention: rotary embedding, cache update and grouped-query attention to the cache."""
