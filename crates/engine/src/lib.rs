//! One vLLM engine, driven from Rust: the only crate that knows vLLM (its wire, its Python, its flags).
