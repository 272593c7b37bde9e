//! Where this user's processes keep what need not outlast the machine: discovery, engines' folders.

use std::{env, fs, io, path::Path, path::PathBuf};

/// Returns this user's own folder below the one for temporary files, which everybody can write to.
pub fn path() -> PathBuf {
    env::temp_dir().join(format!("stator-{}", nix::unistd::Uid::effective()))
}

/// Creates that folder.
///
/// # Errors
/// Somebody else can write to it, who could then name workers of his own and be sent everybody's
/// prompts.
pub fn create() -> io::Result<()> {
    create_private(&path())
}

fn create_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Of the path itself, not of what a link there, perhaps somebody else's, leads to.
    let data = fs::symlink_metadata(path)?;
    let ours = data.uid() == nix::unistd::Uid::effective().as_raw();
    if data.is_dir() && ours && data.permissions().mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "{} is not a folder that only this user can write to; set TMPDIR to another place",
            path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_can_write_to_is_not_private() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("mine");
        create_private(&path).unwrap();
        create_private(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(create_private(&path).is_err());
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(create_private(&link).is_err());
    }
}
