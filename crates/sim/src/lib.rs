//! A simulated engine that speaks the wire of vLLM's EngineCore.
