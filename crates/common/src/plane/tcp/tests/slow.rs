//! What a reader that falls behind costs, and whom.

use super::*;

#[tokio::test]
async fn a_slow_reader_gets_merged_deltas_and_others_go_on() {
    let mut worker = worker(|_| {});
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

#[tokio::test]
async fn a_processor_that_does_not_read_costs_one_delta_per_stream() {
    let mut worker = worker(|_| {});
    // A peer that submits two requests and then reads nothing.
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_hello(&mut hello, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut hello, 1, &request("a"));
    frame::put_submit(&mut hello, 2, &request("b"));
    socket.write_all(&hello).await.unwrap();
    let (connection, ..) = worker.submitted().await;
    worker.submitted().await;
    // More than both socket buffers hold, and far less in one merged delta's allocation.
    let steps = 20_000_u32;
    for n in 0..steps {
        connection.send(&mut vec![tokens(1, vec![n; 100]), tokens(2, [n])], None);
    }
    assert!(connection.waiting_streams() <= 2);
    connection.send(
        &mut vec![last(1, FinishReason::Stop), last(2, FinishReason::Stop)],
        None,
    );
    // It reads after all, and nothing is missing.
    let mut buf = BytesMut::new();
    let mut got = [Delta::default(), Delta::default()];
    while got.iter().any(|delta| !delta::is_last(delta)) {
        while let Some(header) = frame::peek(&buf, frame::MAX_FRAME).unwrap() {
            let payload = frame::take(&mut buf, header);
            if header.kind == Some(frame::Kind::Step) {
                let step: crate::proto::worker::StepDeltas =
                    frame::message(frame::Kind::Step, payload).unwrap();
                for delta in step.deltas {
                    let at = delta.stream as usize - 1;
                    delta::merge(&mut got[at], delta);
                }
            }
        }
        if got.iter().all(delta::is_last) {
            break;
        }
        assert_ne!(socket.read_buf(&mut buf).await.unwrap(), 0);
    }
    assert_eq!(got[0].tokens.len(), steps as usize * 100);
    assert_eq!(got[1].tokens, (0..steps).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_processor_that_never_reads_again_is_cut_off_at_the_limit() {
    let mut worker = worker(|config| config.max_backlog = 1 << 20);
    let mut socket = TcpStream::connect(&worker.address).await.unwrap();
    let mut hello = BytesMut::new();
    frame::put_hello(&mut hello, &crate::proto::plane::Hello::default());
    frame::put_submit(&mut hello, 1, &request("a"));
    socket.write_all(&hello).await.unwrap();
    let (connection, ..) = worker.submitted().await;
    while !connection.is_closed() {
        connection.send(&mut vec![tokens(1, vec![0; 10_000])], None);
    }
    assert!(matches!(worker.seen.recv().await, Some(Seen::Closed)));
}

#[tokio::test]
async fn a_reader_that_never_reads_loses_its_stream_only() {
    let mut worker = worker(|_| {});
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
