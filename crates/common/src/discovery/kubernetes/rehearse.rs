//! Looks, before a model is loaded, whether its worker will be able to register.

use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;

use super::{
    Place,
    access::{self, Verb},
    keep::{MANAGER, Trouble},
    pod::{self, NoContainer, Record},
};
use crate::Card;

/// Does what registering does, but writes nothing.
pub(super) async fn rehearse(place: &Place, name: &str) -> Result<(), Trouble> {
    let which = ListParams::default().fields(&format!("metadata.name={name}"));
    let found = access::look(&place.pods, &which).await;
    let found = found.map_err(|(error, verb)| Trouble::of_call(&error, verb))?;
    let Some(pod) = found.items.first() else {
        return Err(Trouble::Refused(format!(
            "there is no pod '{name}': check POD_NAME (--kubernetes-pod) and POD_NAMESPACE (--kubernetes-namespace)"
        )));
    };
    match pod::own_container(pod, place.settings.container.as_deref()) {
        Ok(_) | Err(NoContainer::NotYet(_)) => {}
        Err(reason) => return Err(Trouble::Refused(reason.to_string())),
    }
    let rehearsal = PatchParams {
        dry_run: true,
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = json!({"metadata": {"labels": {Card::LABEL: "true"}}});
    let merge = Patch::Merge(&patch);
    let patched = place.pods.patch(name, &rehearsal, &merge);
    patched
        .await
        .map_err(|error| Trouble::of_call(&error, Verb::Patch))?;
    Ok(())
}
