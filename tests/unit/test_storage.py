"""Reading from a folder and from real servers, with every kind of fault."""

import gc
import json
import math
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
from faulty_server import FAULTS, serving
from page_cache import drop_pages, resident_share, settled
from pictures import write_folder

from kfood_dist.data.shards.manifest import load_manifest
from kfood_dist.data.shards.reader import open_split
from kfood_dist.data.storage.base import MissingFileError, merge_ranges
from kfood_dist.data.storage.local import LocalStorage
from kfood_dist.data.storage.open import open_storage
from kfood_dist.data.storage.remote import RemoteStorage
from kfood_dist.errors import ShardError
from kfood_dist.pack.options import PackOptions
from kfood_dist.pack.pack import pack
from kfood_dist.pack.split import parse_fractions

OPTIONS = PackOptions(image_size=32, shard_size=7, workers=1, fractions=parse_fractions("0.75,0,0.25"))
TAR = "train-000001.tar"  # samples 7 to 13


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """18 train samples in 3 shards, 6 test samples."""
    root = tmp_path_factory.mktemp("packed")
    pack(write_folder(root / "source", {"구이/구이/불고기": 12, "한과/약과": 12}), root / "out", OPTIONS)
    return root / "out"


@pytest.fixture
def server(packed):
    with serving(packed) as server:
        yield server


@pytest.fixture(scope="module")
def local(packed):
    split = open_split(packed, "train")
    return [split.read(i) for i in range(len(split))]


# The time limit where an answer is expected. On a busy machine it may take 0.3 s.
PATIENT_S = 2


def quick(url, **options):
    """Return a storage that gives up after about a second."""
    return RemoteStorage(url, **{"num_tries": 3, "timeout_s": 0.3, "pause_s": 0.01} | options)


# --- local


def test_a_path_and_a_file_url_are_the_same_folder(packed, local):
    for where in (packed, str(packed), packed.as_uri(), f"local://{packed}"):
        storage = open_storage(where)
        assert isinstance(storage, LocalStorage) and storage.is_local
        assert storage.where == str(packed)
        assert open_split(where, "train").read(3) == local[3]
    spaced = packed.parent / "한 글%41"
    spaced.symlink_to(packed)
    assert open_split(spaced.as_uri(), "train").read(3) == local[3]


@pytest.mark.parametrize("quick_s", [-1.0, 1000.0])
def test_ranges_come_in_order_from_a_quick_and_from_a_slow_disk(packed, monkeypatch, quick_s):
    monkeypatch.setattr("kfood_dist.data.storage.local._QUICK_S", quick_s)  # every read counts as slow, or none does
    storage = LocalStorage(packed)
    data = (packed / TAR).read_bytes()
    ranges = [(TAR, 512 * n % len(data), 1 + 97 * n) for n in range(40)]
    assert storage.read_ranges(ranges) == [data[at : at + size] for _, at, size in ranges]
    [cut, missing, empty] = storage.read_ranges([(TAR, len(data) - 5, 9), ("none.tar", 0, 4), (TAR, 3, 0)])
    assert (cut, empty) == (data[-5:], b"")
    assert isinstance(missing, ShardError) and "none.tar cannot be opened (No such file" in missing.what
    storage.close()


def test_nearby_ranges_are_one_read_within_bounds():
    ranges = [("b", 0, 5), ("a", 100, 10), ("a", 0, 50), ("a", 60, 10), ("a", 62, 2), ("a", 200, 10)]
    assert merge_ranges(ranges, gap=30) == [(("a", 0, 110), [2, 3, 4, 1]), (("a", 200, 10), [5]), (("b", 0, 5), [0])]
    assert merge_ranges(ranges, gap=30, longest=60) == [
        (("a", 0, 50), [2]),
        (("a", 60, 50), [3, 4, 1]),
        (("a", 200, 10), [5]),
        (("b", 0, 5), [0]),
    ]
    assert merge_ranges([("a", 0, 9), ("a", 0, 9), ("a", 3, 2)], gap=0) == [(("a", 0, 9), [0, 1, 2])]


def test_a_slow_disk_is_read_by_several_threads_at_once(packed, monkeypatch):
    """Eight reads wait for each other. One after another, they would never end."""
    barrier = threading.Barrier(8)
    pread = os.pread

    def waiting(*words):
        barrier.wait(20)
        return pread(*words)

    storage = LocalStorage(packed)
    monkeypatch.setattr("kfood_dist.data.storage.base._GAP_BYTES", 0)
    storage._is_quick = False  # as after a slow read
    monkeypatch.setattr("os.pread", waiting)
    assert storage.read_ranges([(TAR, 100 * n, 10) for n in range(8)])


def test_will_need_brings_all_of_a_long_range_into_the_page_cache(tmp_path):
    """For one call of `posix_fadvise`, the kernel reads at most the read-ahead of the disk. This range is longer."""
    path = tmp_path / "long.tar"
    path.write_bytes(os.urandom(1 << 20) * 64)
    drop_pages(path)
    at, size = (5 << 20) + 777, 48 << 20
    LocalStorage(tmp_path).will_need([("none.tar", 0, 9), ("long.tar", at, size)])
    assert settled(lambda: resident_share(path, at, size), 0.99) >= 0.99
    assert resident_share(path, 0, 4 << 20) < 0.1, "no more than the range was brought in"


def test_will_need_does_not_wait_for_the_disk(packed, monkeypatch):
    """`posix_fadvise` blocks here until the test continues."""
    gone_on, advised = threading.Event(), threading.Event()
    monkeypatch.setattr("os.posix_fadvise", lambda *words: gone_on.wait(20) and advised.set())
    LocalStorage(packed).will_need([(TAR, 0, 10)])
    assert not advised.is_set()
    gone_on.set()
    assert advised.wait(20)


def test_an_unknown_protocol_or_a_missing_package_is_reported_with_the_remedy(monkeypatch):
    with pytest.raises(ShardError, match="gopher:// is not a protocol that fsspec knows → use a path"):
        open_storage("gopher://host/x")
    with pytest.raises(ShardError, match=r"ftp://host/x cannot be opened: .*'host'.* → use a path, or http"):
        open_storage("ftp://host/x").read("manifest.json")
    code = """
import sys
sys.modules["s3fs"] = None
from kfood_dist.data.storage.open import open_storage
from kfood_dist.errors import KfoodError
try:
    open_storage("s3://bucket/x")
except KfoodError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "s3:// needs a package that is not installed" in done.stdout
    assert "→ pip install 'kfood_dist[s3]'" in done.stdout


def test_a_local_data_set_does_not_import_fsspec(packed):
    code = f"""
import sys
from kfood_dist.data.shards.reader import open_split
open_split({str(packed)!r}, "train").read(0)
assert not {{"fsspec", "aiohttp", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- http


@pytest.mark.parametrize("rest", ["?X-Signature=s3cr3t", "/?a=1", "#s3cr3t", "?", "?x#y"])
def test_a_url_with_a_query_or_fragment_is_refused_without_repeating_it(rest):
    message = r"https://host/set/? is followed by a query or fragment .* → give only the folder's address; .* s3://"
    with pytest.raises(ShardError, match=message) as error:
        open_storage("https://host/set" + rest)
    assert "s3cr3t" not in str(error.value)


def test_a_url_gives_what_the_folder_gives(packed, server, local):
    split = open_split(server.url + "/", "train")
    assert split.read_many(range(18)) == local
    assert split.read(9) == open_split(packed, "train").read(9)
    assert split.index_hash == open_split(packed, "train").index_hash
    assert split.manifest.where == server.url
    split.require_files()
    split.will_need(range(18))  # does nothing, because a server takes no advice
    with pytest.raises(ShardError, match="is not a local folder, but this needs one"):
        _ = split.manifest.folder


def test_nearby_samples_are_one_request(server, local):
    split = open_split(quick(server.url), "train")
    split.read_many(range(7, 14))
    split.read_many(reversed(range(7, 14)))
    assert server.gets[TAR] == 2
    # Only the manifest, two indexes and two shards are requested, and of a shard only the wanted bytes.
    assert split.read_many([0, 13]) == [local[0], local[13]]
    assert server.gets == {
        "manifest.json": 1,
        "train-000000.index.npy": 1,
        "train-000001.index.npy": 1,
        "train-000000.tar": 1,
        TAR: 3,
    }
    assert server.sent["train-000000.tar"] == split.rows([0])["size"][0]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_temporary_fault_is_retried(server, local, kind):
    split = open_split(quick(server.url, timeout_s=PATIENT_S), "train")
    split.rows(range(18))
    server.gets.clear()
    server.break_next(kind, TAR, 2)
    assert split.read_many(range(18)) == local
    assert server.gets == {"train-000000.tar": 1, TAR: 3, "train-000002.tar": 1}  # only the failed request is repeated


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("reset", "ClientPayloadError|ClientOSError|ServerDisconnectedError"),
        ("500", "status 500"),
        ("truncated", "only [0-9,]+ of [0-9,]+ bytes came"),
        ("stall", "no answer within 0.3 s"),
    ],
)
def test_a_lasting_fault_is_one_error_and_affects_only_its_shard(server, local, kind, cause):
    split = open_split(quick(server.url), "train")
    split.rows(range(18))
    server.gets.clear()
    server.break_next(kind, TAR, math.inf)
    results = split.read_many(range(18))
    assert results[:7] == local[:7] and results[14:] == local[14:]
    assert all(isinstance(result, ShardError) for result in results[7:14])
    with pytest.raises(ShardError, match=rf"{server.url}/{TAR} cannot be read, after 3 tries \(.*({cause})") as message:
        split.read(9)
    assert "check the network and the server" in message.value.remedy
    assert server.gets[TAR] == 6  # exactly three tries for each of the two calls
    server.break_next(kind, TAR, 0)
    assert split.read(9) == local[9]


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", ["manifest.json", "train-000001.index.npy"])
def test_manifest_and_index_are_retried_too(server, local, kind, name):
    if (kind, name) == ("truncated", "manifest.json"):
        return  # the size of the manifest is not known in advance; the next test covers this
    server.break_next(kind, name, 2)
    assert open_split(quick(server.url, timeout_s=PATIENT_S), "train").read_many(range(18)) == local
    server.break_next(kind, name, math.inf)
    with pytest.raises(ShardError, match=f"/{name} cannot be read, after 3 tries"):
        open_split(quick(server.url), "train").read(8)


def test_a_truncated_manifest_is_reported(server):
    server.break_next("truncated", "manifest.json", 1)
    with pytest.raises(ShardError, match=r"/manifest.json is not JSON"):
        load_manifest(quick(server.url))


def test_a_permanent_error_is_not_retried(server, tmp_path, local):
    with pytest.raises(MissingFileError, match=r"/none has no manifest\.json"):
        load_manifest(quick(f"{server.url}/none"))
    assert server.gets["none/manifest.json"] == 1
    split = open_split(quick(server.url), "train")
    server.break_next("403", TAR, math.inf)
    with pytest.raises(ShardError, match=rf"/{TAR} is refused \(status 403.* → check the credentials"):
        split.read(9)
    assert server.gets[TAR] == 1
    server.break_next("403", TAR, 0)
    [missing] = quick(server.url).read_ranges([("none.tar", 0, 4)])
    assert isinstance(missing, MissingFileError) and server.gets["none.tar"] == 1
    assert f"{server.url}/none.tar does not exist" in str(missing)


def test_a_server_that_ignores_ranges_is_noticed(server):
    split = open_split(quick(server.url), "train")
    server.ignores_ranges = True
    with pytest.raises(ShardError, match=r"train-000001.tar .*it ignores range requests"):
        split.read(9)
    assert server.gets[TAR] == 1


def test_an_unreachable_server_is_reported(server):
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ShardError, match=rf"{url}/manifest.json cannot be read, after 3 tries \(Client"):
        load_manifest(quick(url))


def test_wrong_bytes_from_a_server_are_noticed(packed, tmp_path, local):
    copy = shutil.copytree(packed, tmp_path / "copy")
    row = open_split(packed, "train").rows([9])[0]
    data = bytearray((copy / TAR).read_bytes())
    data[int(row["offset"]) + 562] ^= 1
    (copy / TAR).write_bytes(data)
    with serving(copy) as server:
        split = open_split(quick(server.url), "train")
        results = split.read_many(range(18))
    assert [i for i, result in enumerate(results) if isinstance(result, ShardError)] == [9]
    assert "has wrong bytes at train-00000009 (crc32 differs)" in str(results[9])


def test_require_files_asks_the_server_for_sizes_and_names_faults(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    with serving(copy) as server:
        split = open_split(quick(server.url), "train")
        split.require_files()
        os.truncate(copy / TAR, 700)
        with pytest.raises(ShardError, match=rf"/{TAR} has 700 bytes, not the"):
            split.require_files()
        (copy / TAR).unlink()
        with pytest.raises(MissingFileError, match=rf"/{TAR} does not exist"):
            split.require_files()


def read_all(split, connection):
    connection.send(split.read_many(range(len(split))))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_split_behind_a_url_works_in_other_processes(server, local, method):
    """The loop thread and connections do not work in a forked child, and the fork must not break the parent's."""
    split = open_split(quick(server.url, timeout_s=2), "train")
    assert split.read(0) == local[0]
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    process = context.Process(target=read_all, args=(split, there))
    process.start()
    assert here.poll(60)
    assert here.recv() == local
    process.join()
    before = server.gets["train-000000.tar"]
    assert split.read(0) == local[0]
    assert server.gets["train-000000.tar"] == before + 1  # at the first try


def test_a_child_keeps_the_connections_it_inherited(server, local):
    """Their finalizers would wait for a thread that the child does not have, and close sockets that the parent uses."""
    split = open_split(quick(server.url, timeout_s=2), "train")
    inherited = weakref.ref(split.manifest.storage._open())
    child = os.fork()
    if child == 0:
        del split
        gc.collect()
        os._exit(3 if inherited() is None else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert split.read(0) == local[0]
    assert server.gets["train-000000.tar"] == 1


class AsDataset:
    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return self.split.read(i)


def as_it_is(sample):
    return sample


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_read_from_a_url(server, local, method):
    from torch.utils.data import DataLoader

    split = open_split(quick(server.url, timeout_s=10), "train")
    assert split.read(0) == local[0]
    server.break_next("500", TAR, 2)
    loader = DataLoader(
        AsDataset(split),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=2,
        multiprocessing_context=method,
        timeout=60,
    )
    assert list(loader) == local


def test_a_pickled_storage_keeps_its_settings():
    storage = RemoteStorage("http://host/x/", num_tries=2, timeout_s=3, pause_s=4, num_in_flight=5)
    assert vars(pickle.loads(pickle.dumps(storage))) == vars(storage)
    assert storage.where == "http://host/x"


def test_several_requests_are_in_flight_at_once(packed, local):
    """The server answers no request before it has four. With one request at a time, this would never end."""
    barrier = threading.Barrier(4)
    with serving(packed) as server:
        split = open_split(quick(server.url, num_in_flight=4, timeout_s=20), "train")
        split.rows(range(18))
        shards = open_split(quick(server.url), "test")
        shards.rows(range(6))
        take = server.take_fault
        server.take_fault = lambda name: barrier.wait(10) and take(name)
        ranges = [(f"train-00000{n}.tar", 0, 10) for n in (0, 1, 2)] + [("test-000000.tar", 0, 10)]
        assert all(len(data) == 10 for data in split.manifest.storage.read_ranges(ranges))


# --- s3


@pytest.fixture(scope="module")
def bucket(packed):
    """The packed folder in a bucket of a local S3 server, which environment variables name, as for a user."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="food")
        for path in packed.iterdir():
            client.put_object(Bucket="food", Key=f"sets/kfood/{path.name}", Body=path.read_bytes())
        yield client
    server.stop()


def test_a_bucket_gives_what_the_folder_gives(bucket, local):
    split = open_split("s3://food/sets/kfood", "train")
    split.require_files()
    assert split.read_many(range(18)) == local
    assert pickle.loads(pickle.dumps(split)).read(5) == local[5]


def test_a_file_that_a_bucket_lacks_is_named(bucket, local):
    storage = RemoteStorage("s3://food/sets/kfood", num_tries=2, pause_s=0.01, timeout_s=10)
    split = open_split(storage, "train")
    bucket.delete_object(Bucket="food", Key=f"sets/kfood/{TAR}")  # no later test reads this object
    results = split.read_many(range(18))
    assert results[:7] == local[:7]
    assert isinstance(results[9], MissingFileError)
    assert f"s3://food/sets/kfood/{TAR} does not exist" in str(results[9])
    with pytest.raises(MissingFileError, match=rf"s3://food/sets/kfood/{TAR} does not exist"):
        split.require_files()
    with pytest.raises(MissingFileError, match=r"s3://nobucket/x has no manifest\.json"):
        load_manifest(RemoteStorage("s3://nobucket/x", num_tries=2, pause_s=0.01, timeout_s=10))


def test_missing_credentials_for_a_bucket_are_reported_at_once(bucket):
    code = """
from kfood_dist.data.storage.remote import RemoteStorage
try:
    RemoteStorage("s3://food/sets/kfood", pause_s=1000).read("manifest.json")
except Exception as error:
    print(error)
"""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "s3://food/sets/kfood/manifest.json is refused (NoCredentialsError" in done.stdout
    assert "→ check the credentials" in done.stdout


def test_the_manifest_of_a_url_equals_that_of_the_folder(packed, server):
    assert load_manifest(server.url).raw == json.loads((packed / "manifest.json").read_text())
