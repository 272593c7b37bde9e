//! Which worker serves a request: a pure decision over a snapshot, with its reasons.
