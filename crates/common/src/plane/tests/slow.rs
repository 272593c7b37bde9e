//! What a reader that falls behind costs, and whom.

use super::*;

on_every_plane!(
    a_slow_reader_gets_merged_deltas_and_others_go_on,
    a_reader_that_never_reads_loses_its_stream_only,
);

async fn a_slow_reader_gets_merged_deltas_and_others_go_on(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let client = worker.client().await;
    let mut slow = client.generate(&request("slow")).unwrap();
    let (connection, slow_number, _) = worker.submitted().await;
    let mut quick = client.generate(&request("quick")).unwrap();
    let (_, quick_number, _) = worker.submitted().await;
    for n in 0..1000 {
        connection.send(&mut vec![tokens(slow_number, [n])], None);
    }
    connection.send(&mut vec![tokens(quick_number, [7])], None);
    assert_eq!(quick.next().await.unwrap().tokens, [7]);
    let delta = slow.next().await.unwrap();
    assert_eq!(delta.tokens, (0..1000).collect::<Vec<_>>());
}

async fn a_reader_that_never_reads_loses_its_stream_only(plane: Plane) {
    let mut worker = plane.worker(|_| {});
    let client = worker.client().await;
    let mut stuck = client.generate(&request("stuck")).unwrap();
    let (connection, number, _) = worker.submitted().await;
    let cancelled = loop {
        connection.send(&mut vec![tokens(number, vec![0; 100_000])], None);
        tokio::task::yield_now().await;
        if let Ok(Seen::Cancel(stream)) = worker.seen.try_recv() {
            break stream;
        }
    };
    assert_eq!(cancelled, number);
    let delta = stuck.next().await.unwrap();
    assert_eq!(
        delta.error.unwrap().code(),
        crate::proto::worker::Code::Overloaded
    );
    assert!(stuck.next().await.is_none());
}
