use super::*;
use crate::{
    discovery::{
        Event,
        tests::{card, peer},
    },
    ids::WorkerId,
    process::{host, start_of},
};

fn gone(worker: &str) -> Option<Event> {
    Some(Event::Gone(WorkerId(worker.to_owned())))
}

fn put(worker: &str) -> Option<Event> {
    Some(Event::Put(Box::new(card(worker))))
}

fn path(root: &Path, worker: &str) -> PathBuf {
    root.join("test").join(format!("{worker}.json"))
}

#[tokio::test]
async fn a_watcher_learns_of_workers_that_were_there_come_and_leave() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new(root.path());
    let first = files.register(card("a")).await.unwrap();
    let mut watch = files.watch().await.unwrap();
    assert_eq!(watch.next().await, put("a"));
    let second = files.register(card("b")).await.unwrap();
    assert_eq!(watch.next().await, put("b"));
    drop(first);
    assert_eq!(watch.next().await, gone("a"));
    drop(second);
    assert_eq!(watch.next().await, gone("b"));
}

#[tokio::test(start_paused = true)]
async fn a_vanished_file_is_written_again() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new(root.path());
    let _registration = files.register(card("a")).await.unwrap();
    let mut watch = files.watch().await.unwrap();
    assert_eq!(watch.next().await, put("a"));
    fs::remove_file(path(root.path(), "a")).unwrap();
    assert_eq!(watch.next().await, gone("a"));
    assert_eq!(watch.next().await, put("a"));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_nobody_renews_ends() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new(root.path());
    let registration = files.register(card("a")).await.unwrap();
    // A process of another host: its lease is all that is known of it.
    let file = path(root.path(), "a");
    let mut entry: Entry = read(&file).unwrap();
    entry.owner.host = "elsewhere".to_owned();
    entry.card.worker = WorkerId("b".to_owned());
    fs::write(path(root.path(), "b"), serde_json::to_vec(&entry).unwrap()).unwrap();
    drop(registration);
    let mut watch = files.watch().await.unwrap();
    assert_eq!(watch.next().await, put("b"));
    assert_eq!(watch.next().await, gone("b"));
}

#[tokio::test]
async fn a_worker_whose_process_died_on_this_host_is_gone_at_once() {
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let root = tempfile::tempdir().unwrap();
    let entry = Entry {
        owner: Owner {
            host: host(),
            pid: child.id(),
            start: start_of(child.id()).unwrap(),
        },
        card: card("a"),
    };
    fs::create_dir(root.path().join("test")).unwrap();
    fs::write(path(root.path(), "a"), serde_json::to_vec(&entry).unwrap()).unwrap();
    let mut watch = Files::new(root.path()).watch().await.unwrap();
    assert_eq!(watch.next().await, put("a"));
    // A zombie until it is waited for, which counts as dead.
    child.kill().unwrap();
    assert_eq!(watch.next().await, gone("a"));
    child.wait().unwrap();
}

#[tokio::test]
async fn processors_are_there_until_they_leave_or_die_and_are_no_workers() {
    let root = tempfile::tempdir().unwrap();
    let files = Files::new(root.path());
    let mut watch = files.watch().await.unwrap();
    let one = files.join(peer("one")).await.unwrap();
    let mut child = std::process::Command::new("sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let entry = PeerEntry {
        owner: Owner {
            host: host(),
            pid: child.id(),
            start: start_of(child.id()).unwrap(),
        },
        peer: peer("two"),
    };
    // Whoever looks for cards does not even read these.
    assert!(list(&root.path().join(".peers")).unwrap().is_empty());
    let path = root.path().join(PEERS).join("two.json");
    fs::write(path, serde_json::to_vec(&entry).unwrap()).unwrap();
    let mut there = files.peers().await.unwrap();
    there.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(there, [peer("one"), peer("two")]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(files.peers().await.unwrap(), [peer("one")]);
    drop(one);
    assert_eq!(files.peers().await.unwrap(), []);
    let _worker = files.register(card("a")).await.unwrap();
    assert_eq!(watch.next().await, put("a"));
}

#[tokio::test]
async fn a_file_that_is_no_card_is_skipped() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("test")).unwrap();
    fs::write(path(root.path(), "x"), "{").unwrap();
    let files = Files::new(root.path());
    let mut watch = files.watch().await.unwrap();
    let _registration = files.register(card("a")).await.unwrap();
    assert_eq!(watch.next().await, put("a"));
}

#[tokio::test]
async fn a_name_that_leaves_the_folder_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let result = Files::new(root.path()).register(card("../a")).await;
    assert!(matches!(result.err(), Some(DiscoveryError::Name(_))));
}

#[tokio::test]
async fn a_folder_that_others_can_write_to_is_refused() {
    let parent = tempfile::tempdir().unwrap();
    let root = parent.path().join("discovery");
    let files = Files::new(&root);
    // One that was made here is not.
    let registration = files.register(card("a")).await.unwrap();
    drop(registration);
    for shared in [&root, &root.join("test")] {
        for mode in [0o775, 0o757, 0o1777] {
            fs::set_permissions(shared, fs::Permissions::from_mode(mode)).unwrap();
            let refused = files.register(card("a")).await.err().unwrap();
            assert!(refused.to_string().contains("chmod"), "{refused}");
        }
        if shared == &root {
            assert!(files.watch().await.is_err());
        }
        fs::set_permissions(shared, fs::Permissions::from_mode(0o755)).unwrap();
    }
}
