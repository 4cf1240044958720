//! Places at which a guest can be interrupted, where wasmtime has none: before each call that may lead to the host.
//!
//! wasmtime looks at the epoch where a function begins and where a loop turns. A function that calls the host a hundred thousand
//! times in a row has neither: it would hold its thread, could not be ended, and nothing would count what the host keeps for it
//! in the meantime. A loop that is empty is such a place too, and changes nothing else.

use wasmparser::{
    BinaryReader, BinaryReaderError, CodeSectionReader, FunctionBody, ImportSectionReader, Operator, TypeRef,
};

/// Part of what compiled code is known by: another number where another text is compiled.
pub const REVISION: u32 = 1;

const HEADER: usize = 8;
/// The byte of the header that says whether it is a component.
const LAYER: usize = 6;
/// `loop` without parameters and results, `end`.
const EMPTY_LOOP: [u8; 3] = [0x03, 0x40, 0x0b];

const CUSTOM: u8 = 0;
const CORE_MODULE: u8 = 1;
const IMPORTS: u8 = 2;
const COMPONENT: u8 = 4;
const CODE: u8 = 10;

/// The same module or component, with these places in it. Fails for what is none.
pub fn add(wasm: &[u8]) -> Result<Vec<u8>, BinaryReaderError> {
    let mut reader = BinaryReader::new(wasm, 0);
    let header = reader.read_bytes(HEADER)?;
    let component = header.get(LAYER).is_some_and(|layer| *layer != 0);
    let mut output = Vec::with_capacity(wasm.len() + wasm.len() / 16);
    output.extend_from_slice(header);
    let mut imported = 0;
    while !reader.eof() {
        let id = reader.read_u8()?;
        let size = reader.read_var_u32()?;
        let content = reader.read_bytes(size as usize)?;
        match (component, id) {
            (true, CORE_MODULE | COMPONENT) => put(&mut output, id, &add(content)?),
            (false, CODE) => put(&mut output, id, &code(content, imported)?),
            // What it says of places in the code would be said of others.
            (false, CUSTOM) if BinaryReader::new(content, 0).read_string()?.starts_with("metadata.code.") => {}
            (false, IMPORTS) => {
                imported = functions(content)?;
                put(&mut output, id, content);
            }
            _ => put(&mut output, id, content),
        }
    }
    Ok(output)
}

/// How many functions are imported: they have the first indices.
fn functions(section: &[u8]) -> Result<u32, BinaryReaderError> {
    let mut count = 0;
    for import in ImportSectionReader::new(BinaryReader::new(section, 0))?.into_imports() {
        count += u32::from(matches!(import?.ty, TypeRef::Func(_) | TypeRef::FuncExact(_)));
    }
    Ok(count)
}

fn code(section: &[u8], imported: u32) -> Result<Vec<u8>, BinaryReaderError> {
    let bodies = CodeSectionReader::new(BinaryReader::new(section, 0))?;
    let mut output = Vec::with_capacity(section.len() + section.len() / 16);
    put_number(&mut output, bodies.count());
    for body in bodies {
        let body = body_with_places(&body?, imported)?;
        put_number(&mut output, body.len() as u32);
        output.extend_from_slice(&body);
    }
    Ok(output)
}

fn body_with_places(body: &FunctionBody<'_>, imported: u32) -> Result<Vec<u8>, BinaryReaderError> {
    let (bytes, start) = (body.as_bytes(), body.range().start);
    let mut output = Vec::with_capacity(bytes.len() + bytes.len() / 8);
    let mut copied = 0;
    for operator in body.get_operators_reader()?.into_iter_with_offsets() {
        let (operator, offset) = operator?;
        let leaves = match operator {
            Operator::Call { function_index } | Operator::ReturnCall { function_index } => function_index < imported,
            Operator::CallIndirect { .. }
            | Operator::ReturnCallIndirect { .. }
            | Operator::CallRef { .. }
            | Operator::ReturnCallRef { .. } => true,
            _ => false,
        };
        if leaves {
            let at = offset - start;
            output.extend_from_slice(bytes.get(copied..at).unwrap_or_default());
            output.extend_from_slice(&EMPTY_LOOP);
            copied = at;
        }
    }
    output.extend_from_slice(bytes.get(copied..).unwrap_or_default());
    Ok(output)
}

fn put(output: &mut Vec<u8>, id: u8, content: &[u8]) {
    output.push(id);
    put_number(output, content.len() as u32);
    output.extend_from_slice(content);
}

/// LEB128.
fn put_number(output: &mut Vec<u8>, mut number: u32) {
    while number >= 0x80 {
        output.push(number as u8 | 0x80);
        number >>= 7;
    }
    output.push(number as u8);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use wasmparser::{Parser, Payload, Validator};

    /// Whether each operator that leaves its module, in order of the bytes, comes right after an empty loop.
    fn places(wasm: &[u8]) -> Vec<bool> {
        let mut found = Vec::new();
        for payload in Parser::new(0).parse_all(wasm) {
            let Payload::CodeSectionEntry(body) = payload.unwrap() else { continue };
            let operators: Vec<_> = body
                .get_operators_reader()
                .unwrap()
                .into_iter()
                .map(|operator| format!("{:?}", operator.unwrap()))
                .collect();
            for (index, operator) in operators.iter().enumerate() {
                if operator.starts_with("Call") || operator.starts_with("ReturnCall") {
                    let before = operators.get(index.saturating_sub(2)..index).unwrap();
                    found.push(before.first().is_some_and(|first| first.starts_with("Loop")));
                }
            }
        }
        found
    }

    const CORE: &str = r#"(module $m (type $t (func)) (import "a" "f" (func $f)) (import "a" "m" (memory 1)) (import "a" "g" (func $g))
        (table 2 funcref) (elem (i32.const 0) $f) (func $own) (elem declare func $f)
        (func (export "all") (local i32)
            (call $f) (call $g) (call $own) (call_indirect (i32.const 0)) (call_ref $t (ref.func $f)) unreachable (call $f))
        (func (return_call $g)) (func (return_call $own)) (func (return_call_indirect (i32.const 0)))
        (func (return_call_ref $t (ref.func $f))))"#;
    const LEAVES: [bool; 10] = [true, true, false, true, true, true, true, false, true, true];

    #[test]
    fn each_call_that_may_lead_to_the_host_comes_after_one_and_no_other() {
        for text in [CORE.to_owned(), format!("(component (component (core {}))", CORE.trim_start_matches('('))] {
            let wasm = wat::parse_str(&text).unwrap();
            let with = add(&wasm).unwrap();
            Validator::new_with_features(wasmparser::WasmFeatures::all()).validate_all(&with).unwrap();
            assert_eq!(places(&wasm), [false; 10]);
            assert_eq!(places(&with), LEAVES);
        }
    }

    #[test]
    fn hints_about_places_in_the_code_are_left_out_and_other_custom_sections_stay() {
        let text = r#"(module (@custom "metadata.code.branch_hint" "\00") (@custom "name of mine" "x") (func))"#;
        let with = add(&wat::parse_str(text).unwrap()).unwrap();
        let names: Vec<_> = Parser::new(0)
            .parse_all(&with)
            .filter_map(|payload| match payload.unwrap() {
                Payload::CustomSection(section) => Some(section.name().to_owned()),
                _ => None,
            })
            .collect();
        assert_eq!(names, ["name of mine"]);
    }

    #[test]
    fn bytes_that_are_no_module_are_an_error_or_stay_what_they_are() {
        let wasm = wat::parse_str(CORE).unwrap();
        let mut random = crate::testing::Random::new(7);
        crate::testing::cases(2000, || {
            let bytes = random.mutate(&wasm);
            let valid = |bytes: &[u8]| Validator::new().validate_all(bytes).is_ok();
            match add(&bytes) {
                Ok(with) => assert_eq!(valid(&bytes), valid(&with), "{bytes:?}"),
                Err(_) => assert!(!valid(&bytes), "{bytes:?}"),
            }
        });
    }
}
