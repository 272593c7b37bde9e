//! The OpenAI-compatible ingress: validates, templates, tokenizes, routes, detokenizes, streams.
