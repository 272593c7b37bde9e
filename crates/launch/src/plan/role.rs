//! The roles that a topology can have workers of.

use stator_common::card::Role;

/// In the order in which they are laid out and shown.
pub(crate) const ALL: [Role; 3] = [Role::Agg, Role::Prefill, Role::Decode];

/// Reads the name of a role in [`ALL`].
pub(crate) fn parse(name: &str) -> Option<Role> {
    ALL.into_iter().find(|role| role.to_string() == name)
}

/// Returns the name of the program that is this role.
pub(crate) fn program(role: Role) -> String {
    format!("stator-{role}")
}
