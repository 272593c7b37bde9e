//! Requests as named optional fields, read in one pass.
//!
//! The endpoints share most of their fields. `#[serde(flatten)]` would share them too, but it copies the
//! whole body into a tree first and forgets where in the body an error was; so a request here is two sets
//! of fields, its endpoint's own and the shared ones, and each offered name goes to the set that knows it.
//! As with vLLM, `null` means absent, unknown fields are skipped, and the last of two equal names counts.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::Shared;

/// A set of fields that reads itself, one field at a time.
pub(crate) trait Own: Default {
    /// Reads the value of the field `name`. Says `false`, with the value unread, when it has no such field.
    fn read<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<bool, A::Error>;
}

/// A request: the fields of its endpoint and those that all endpoints have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request<T> {
    pub(crate) own: T,
    pub(crate) shared: Shared,
}

/// Declares a set of fields. Each is an `Option` of the type given.
macro_rules! fields {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default)]
        pub(crate) struct $name {
            $($(#[$field_meta])* pub(crate) $field: Option<$type>,)*
        }

        #[cfg(test)]
        impl $name {
            /// The names of its fields.
            pub(crate) const NAMES: &'static [&'static str] = &[$(stringify!($field)),*];
        }

        impl $crate::openai::request::Own for $name {
            fn read<'de, A: serde::de::MapAccess<'de>>(
                &mut self,
                name: &str,
                map: &mut A,
            ) -> Result<bool, A::Error> {
                match name {
                    $(stringify!($field) => self.$field = map.next_value()?,)*
                    _ => return Ok(false),
                }
                Ok(true)
            }
        }
    };
}
pub(crate) use fields;

impl<'de, T: Own> Deserialize<'de> for Request<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RequestVisitor<T>(PhantomData<T>);
        impl<'de, T: Own> Visitor<'de> for RequestVisitor<T> {
            type Value = Request<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut request = Request {
                    own: T::default(),
                    shared: Shared::default(),
                };
                while let Some(Name(name)) = map.next_key()? {
                    let known = request.own.read(&name, &mut map)?
                        || request.shared.read(&name, &mut map)?;
                    if !known {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(request)
            }
        }
        deserializer.deserialize_map(RequestVisitor(PhantomData))
    }
}

/// A field's name, borrowed from the body unless it holds an escape.
struct Name<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field name")
            }

            fn visit_borrowed_str<E: de::Error>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}
