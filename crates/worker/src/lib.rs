//! What the worker roles share: an engine behind the request plane, registered in discovery.
