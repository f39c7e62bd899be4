//! Readers of rows; below, the kinds that bring data and models in.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod hub;
mod inspect;
mod kinds;
mod shape;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use arrow::array::{AsArray as _, Int64Array, StringArray};
use arrow::datatypes::{DataType, Int64Type};
use flow::data::{self, OnError, Reading, Table};
use flow::source::advice;

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    path
}

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Table> {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "named-otherwise", content);
    data::read(&path, Reading::new(name, OnError::Fail))
}

fn skip(name: &str, content: &str) -> Table {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "x", content);
    data::read(&path, Reading::new(name, OnError::Skip)).unwrap()
}

fn texts(table: &Table, column: &str) -> Vec<String> {
    let i = table.index_of(column).unwrap();
    let all = table.batches.iter().flat_map(|b| {
        let column = b.column(i).as_string::<i32>();
        column.iter().map(|v| v.unwrap_or("null").to_owned()).collect::<Vec<_>>()
    });
    all.collect()
}

fn ints(table: &Table, column: &str) -> Vec<Option<i64>> {
    let i = table.index_of(column).unwrap();
    let all = table
        .batches
        .iter()
        .flat_map(|b| b.column(i).as_primitive::<Int64Type>().iter().collect::<Vec<_>>());
    all.collect()
}

fn types(table: &Table) -> Vec<(String, DataType)> {
    table.schema.fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect()
}

const CSV: &str = "text,label\n\"good, \"\"really\"\"\nfilm\",1\nbad,0\n";

#[test]
fn every_format_gives_the_same_rows() {
    let json = r#"[{"text": "good, \"really\"\nfilm", "label": 1}, {"text": "bad", "label": 0}]"#;
    let lines = "{\"text\": \"good, \\\"really\\\"\\nfilm\", \"label\": 1}\n\n\
                 {\"label\": 0, \"text\": \"bad\"}\n";
    let wrapped = format!("{{\"version\": \"1\", \"empty\": [],\n\"data\": {json}}}");
    let dir = tempfile::tempdir().unwrap();
    let parquet = dir.path().join("x");
    data::write(&read("a.csv", CSV).unwrap(), &parquet).unwrap();
    let parquet = std::fs::read(parquet).unwrap();
    let plain: Vec<(&str, Vec<u8>)> = vec![
        ("a.csv", CSV.into()),
        ("a.tsv", CSV.replace(',', "\t").replace("good\t", "good,").into()),
        ("a.json", json.into()),
        ("a.jsonl", lines.into()),
        ("lines-in.json", lines.into()),
        ("wrapped.json", wrapped.into()),
        ("a.parquet", parquet),
    ];
    for (name, content) in plain {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&content).unwrap();
        let zst = zstd::encode_all(content.as_slice(), 1).unwrap();
        for (name, content) in [
            (name.to_owned(), content),
            (format!("{name}.gz"), gz.finish().unwrap()),
            (format!("data/{name}.zst"), zst),
        ] {
            let table = read(&name, content).unwrap();
            assert_eq!(texts(&table, "text"), ["good, \"really\"\nfilm", "bad"], "{name}");
            assert_eq!(ints(&table, "label"), [Some(1), Some(0)], "{name}");
            assert_eq!(table.columns(), ["text", "label"], "{name}");
        }
    }
}

#[test]
fn text_is_a_row_a_line() {
    let table = read("a.txt", "one\r\n\ntwo").unwrap();
    assert_eq!(texts(&table, "text"), ["one", "", "two"]);
    let table = read("a.txt", "\u{feff}one\n".to_owned() + &"x\n".repeat(5000)).unwrap();
    assert_eq!(texts(&table, "text")[0], "one");
    assert!(table.batches.len() > 1);
    assert!(read("a.txt", b"ok\n\xff\n").unwrap_err().to_string().contains("reading a.txt"));
}

#[test]
fn types_of_csv_come_from_all_rows() {
    let table = read("a.csv", "i,f,b,t,code,nan\n1,1,true,x,007,nan\n,2.5,False,,08,1\n").unwrap();
    let types: Vec<DataType> = types(&table).into_iter().map(|(_, ty)| ty).collect();
    use DataType::{Boolean, Float64, Int64, Utf8};
    assert_eq!(types, [Int64, Float64, Boolean, Utf8, Utf8, Utf8]);
    assert_eq!(ints(&table, "i"), [Some(1), None]);
    assert_eq!(texts(&table, "t"), ["x", ""]);
    assert_eq!(texts(&table, "code"), ["007", "08"]);
    // What a number would not give back is text.
    let table = read("a.csv", "phone,id,n\n+49176,99999999999999999999,-1\n1,2,3\n").unwrap();
    assert_eq!(texts(&table, "phone"), ["+49176", "1"]);
    assert_eq!(texts(&table, "id"), ["99999999999999999999", "2"]);
    assert_eq!(ints(&table, "n"), [Some(-1), Some(3)]);
    let long = read("a.csv", "a,b\n".to_owned() + &"1,x\n".repeat(5000)).unwrap();
    assert_eq!((long.rows(), long.batches.len()), (5000, 2));
    assert_eq!(ints(&long, "a")[4999], Some(1));
}

#[test]
fn a_quote_that_is_never_closed_is_named() {
    let content = "text,label\ngood,1\n\"bad,0\nworse,0\nworst,0\n";
    for name in ["a.csv", "a.csv.zst"] {
        let bytes = match name {
            "a.csv" => content.into(),
            _ => zstd::encode_all(content.as_bytes(), 1).unwrap(),
        };
        let e = read(name, bytes).unwrap_err();
        let text = format!("{e:#}");
        assert!(text.contains("row 2") && text.contains("line 3"), "{text}");
        assert!(advice(&e)[0].contains("quote: none"), "{e:?}");
    }
    let e = format!("{:#}", read("a.csv", "\"text,label\ngood,1\n").unwrap_err());
    assert!(e.contains("the header"), "{e}");
    let e = format!("{:#}", read("a.csv", "").unwrap_err());
    assert!(e.contains("a.csv is empty"), "{e}");
    assert_eq!(read("a.csv", "text,label\n").unwrap().rows(), 0);
    assert_eq!(texts(&read("a.csv", "text\n\"a\"").unwrap(), "text"), ["a"]);
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "x", content);
    let reading = Reading::new("a.csv", OnError::Fail).quote(data::Quote::None);
    let table = data::read(&path, reading).unwrap();
    assert_eq!(texts(&table, "text"), ["good", "\"bad", "worse", "worst"]);
}

#[test]
fn long_numbers_of_json_keep_their_digits() {
    let table = read("a.jsonl", "{\"id\": 1}\n{\"id\": 18446744073709551615}\n").unwrap();
    assert_eq!(texts(&table, "id"), ["1", "18446744073709551615"]);
    let e = read("a.jsonl", "{\"id\": 0.5}\n{\"id\": 18446744073709551615}\n").unwrap_err();
    assert!(format!("{e:#}").contains("row 2"), "{e:#}");
}

#[test]
fn a_json_document_is_rows_in_one_way() {
    let one = read("a.json", "{\"messages\": [{\"role\": \"user\"}]}\n").unwrap();
    assert_eq!((one.rows(), one.columns()), (1, vec!["messages"]));
    assert!(one.notes[0].contains("field: messages"), "{:?}", one.notes);
    let e = read("a.json", "{\"a\": [{\"x\": 1}],\n\"b\": [{\"x\": 1}]}").unwrap_err();
    assert!(advice(&e)[0].contains("a, b"), "{e:?}");
    let dir = tempfile::tempdir().unwrap();
    let field = |content: &str, field| {
        let path = write(dir.path(), "x", content);
        data::read(&path, Reading::new("a.json", OnError::Fail).field(Some(field)))
    };
    assert_eq!(field("{\"v\": [{\"x\": 1}, {\"x\": 2}]}", "v").unwrap().rows(), 2);
    assert_eq!(field("{\"v\": []}", "v").unwrap().rows(), 0);
    let e = field("[{\"v\": 1}]", "v").unwrap_err();
    assert!(advice(&e)[0].contains("leave `field` out"), "{e:?}");
}

#[test]
fn objects_without_a_field_are_left_out_by_name() {
    let content = "{\"a\": 1, \"meta\": {}, \"m\": {\"x\": 1, \"y\": {}}}\n".repeat(2);
    let table = read("a.jsonl", content).unwrap();
    assert_eq!(table.columns(), ["a", "m"]);
    assert!(table.notes[0].contains("`meta`"), "{:?}", table.notes);
    let dir = tempfile::tempdir().unwrap();
    data::write(&table, &dir.path().join("x")).unwrap();
    assert_eq!(read("a.jsonl", "{\"meta\": {}}\n").unwrap().columns(), [""; 0]);
}

#[test]
fn shards_may_lack_values() {
    let dir = tempfile::tempdir().unwrap();
    let all = |files: &[(&str, &str)]| {
        let paths: Vec<PathBuf> = files.iter().map(|(n, c)| write(dir.path(), n, c)).collect();
        let named = paths.iter().zip(files);
        let read = named.map(|(p, (n, _))| (p.as_path(), Reading::new(n, OnError::Fail)));
        data::read_all(read.collect())
    };
    let table = all(&[
        ("0.jsonl", "{\"a\": null, \"l\": [], \"o\": {\"x\": null}}\n"),
        ("1.jsonl", "{\"a\": 1, \"l\": [2], \"o\": {\"x\": 2.5}, \"b\": \"t\"}\n"),
        ("2.json", ""),
    ]);
    let table = table.unwrap();
    assert_eq!(table.columns(), ["a", "l", "o", "b"]);
    assert_eq!(ints(&table, "a"), [None, Some(1)]);
    assert_eq!(texts(&table, "b"), ["null", "t"]);
    let shards = [("0.csv", "a,b\n,x\n"), ("1.csv", "b,a\n,7\n"), ("2.csv", "a,b\n,\n")];
    let table = all(&shards).unwrap();
    assert_eq!(ints(&table, "a"), [None, Some(7), None]);
    assert_eq!(texts(&table, "b"), ["x", "", ""]);
    let e = all(&[("0.jsonl", "{\"a\": 1}\n"), ("1.jsonl", "{\"a\": \"x\"}\n")]).unwrap_err();
    assert!(format!("{e:#}").contains("1.jsonl, row 1, column `a`"), "{e:#}");
}

#[test]
fn bad_rows_name_file_row_and_column() {
    for (name, content, wants) in [
        ("a.csv", "text,label\nx,1\ny\n", vec!["a.csv", "row 2", "`label`", "1 fields"]),
        ("a.jsonl", "{\"a\": 1}\n{\"a\": \n", vec!["a.jsonl", "row 2", "not JSON"]),
        ("a.jsonl", "{\"a\": 1}\n{\"a\": \"x\"}\n", vec!["row 2", "`a`", "a number", "text"]),
        ("a.jsonl", "{\"a\": 1}\n[1]\n", vec!["row 2", "an object", "a list"]),
        ("a.json", "[{\"a\": 1}, {\"a\": {\"b\": 1}}]", vec!["row 2", "`a`"]),
        ("a.jsonl", "{\"a\": 1, \"a\": 2}\n", vec!["row 1", "`a`", "twice"]),
    ] {
        let e = format!("{:#}", read(name, content).unwrap_err());
        for want in wants {
            assert!(e.contains(want), "{e} lacks {want}");
        }
        assert_eq!(skip(name, content).skipped, 1, "{content}");
    }
    let e = read("a.csv", b"text,label\n\xff,1\n").unwrap_err();
    assert!(format!("{e:#}").contains("column `text`"), "{e:#}");
    let good = skip("a.jsonl", "{\"a\": 1}\n{\"a\": \"x\", \"b\": 1}\n{\"a\": 3}\n");
    assert_eq!(ints(&good, "a"), [Some(1), Some(3)]);
    assert_eq!(good.columns(), ["a"]);
}

#[test]
fn damaged_files_are_errors() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(CSV.repeat(99).as_bytes()).unwrap();
    let gz = gz.finish().unwrap();
    assert!(read("a.csv.gz", &gz[..gz.len() / 2]).is_err());
    assert!(read("a.csv.zst", b"not zstd at all").is_err());
    assert!(read("a.parquet", b"PAR1 not parquet PAR1").is_err());
    assert!(read("a.json", "[{\"a\": 1}").is_err());
    let e = read("a.xlsx", "").unwrap_err();
    assert!(advice(&e)[0].contains(".parquet"), "{e}");
}

#[test]
fn nested_json_keeps_its_form() {
    let content = r#"{"messages": [{"role": "user", "content": "hi"}], "n": 1}
{"messages": [{"role": "bot", "content": null, "x": 2.5}], "n": 2.5}"#;
    let table = read("a.jsonl", content).unwrap();
    let types = types(&table);
    assert_eq!(types[1], ("n".to_owned(), DataType::Float64));
    let DataType::List(item) = &types[0].1 else { panic!("{types:?}") };
    let DataType::Struct(fields) = item.data_type() else { panic!("{types:?}") };
    let names: Vec<&str> = fields.iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["role", "content", "x"]);
}

#[test]
fn files_of_a_split_must_fit_together() {
    let mut one = read("one.csv", "a,b\n1,x\n").unwrap();
    one.append(read("two.csv", "b,a\ny,2.5\n").unwrap(), "one.csv", "two.csv").unwrap();
    assert_eq!(texts(&one, "b"), ["x", "y"]);
    assert_eq!(types(&one)[0].1, DataType::Float64);
    let e = one.append(read("three.csv", "a,c\n1,2\n").unwrap(), "one.csv", "three.csv");
    let e = e.unwrap_err().to_string();
    assert!(e.contains("three.csv lacks") && e.contains("`b`"), "{e}");
    let e = one.append(read("four.csv", "a,b\n1,2\n").unwrap(), "one.csv", "four.csv");
    assert!(e.unwrap_err().to_string().contains("column `b`"));
}

#[test]
fn written_bytes_depend_on_the_rows_alone() {
    let dir = tempfile::tempdir().unwrap();
    let n = 10_000;
    let label = Int64Array::from_iter_values((0..n).map(|i| i % 7));
    let text = StringArray::from_iter_values((0..n).map(|i| format!("row {i}")));
    let whole = Table::of_columns([
        ("label".to_owned(), std::sync::Arc::new(label) as _),
        ("text".to_owned(), std::sync::Arc::new(text) as _),
    ])
    .unwrap();
    let mut cut = whole.clone();
    let batch = whole.batches[0].clone();
    cut.batches = vec![batch.slice(0, 17), batch.slice(17, 5000), batch.slice(5017, 4983)];
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    data::write(&whole, &a).unwrap();
    data::write(&cut, &b).unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let back = data::read(&a, Reading::new("a.parquet", OnError::Fail)).unwrap();
    assert_eq!(back.rows(), 10_000);
    assert_eq!(texts(&back, "text")[9_999], "row 9999");
}

/// Written by pyarrow 26 with the note that `datasets` leaves: an int64 `label` of classes `neg`
/// and `pos`, a dictionary-encoded `source`, large strings.
#[test]
fn parquet_of_another_program_with_class_names() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/data/reviews.parquet");
    let table = data::read(&path, Reading::new("reviews.parquet", OnError::Fail)).unwrap();
    assert_eq!(table.classes["label"], ["neg", "pos"]);
    assert_eq!(texts(&table, "text"), ["a fine film", "dull", "null"]);
    assert_eq!(texts(&table, "source"), ["web", "web", "print"]);
    assert_eq!(ints(&table, "label"), [Some(1), Some(0), None]);
    let wanted = ["label".to_owned(), "text".to_owned()];
    let reading = Reading::new("reviews.parquet", OnError::Fail).columns(Some(&wanted));
    let some = data::read(&path, reading).unwrap();
    assert_eq!(some.columns(), ["text", "label"]);
    assert_eq!(ints(&some, "label"), ints(&table, "label"));
}
