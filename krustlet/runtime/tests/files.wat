;; A wasi:cli/run component that does OPERATION to its first directory and writes the number of WASI's error code to stderr, or
;; "ok". Operations: (call $open FLAGS DESCRIPTOR-FLAGS) on PATH, and $make, $unlink, $link, $rename.
(component
  (import "wasi:io/error@0.2.0" (instance $error
    (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error-type))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $output-stream (sub resource)))
    (alias outer 1 $error-type (type $outer))
    (export "error" (type $error (eq $outer)))
    (type $stream-error-type (variant (case "last-operation-failed" (own $error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error-type)))
    (export "[method]output-stream.blocking-write-and-flush"
      (func (param "self" (borrow $output-stream)) (param "contents" (list u8)) (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output-stream))
  (import "wasi:cli/stderr@0.2.0" (instance $stderr
    (alias outer 1 $output-stream (type $outer))
    (export "output-stream" (type $output-stream (eq $outer)))
    (export "get-stderr" (func (result (own $output-stream))))))
  (import "wasi:filesystem/types@0.2.0" (instance $types
    (export "descriptor" (type $descriptor (sub resource)))
    (type $error-type (enum "access" "would-block" "already" "bad-descriptor" "busy" "deadlock" "quota" "exist"
      "file-too-large" "illegal-byte-sequence" "in-progress" "interrupted" "invalid" "io" "is-directory" "loop"
      "too-many-links" "message-size" "name-too-long" "no-device" "no-entry" "no-lock" "insufficient-memory"
      "insufficient-space" "not-directory" "not-empty" "not-recoverable" "unsupported" "no-tty" "no-such-device"
      "overflow" "not-permitted" "pipe" "read-only" "invalid-seek" "text-file-busy" "cross-device"))
    (export "error-code" (type $error-code (eq $error-type)))
    (type $path-flags-type (flags "symlink-follow"))
    (export "path-flags" (type $path-flags (eq $path-flags-type)))
    (type $open-flags-type (flags "create" "directory" "exclusive" "truncate"))
    (export "open-flags" (type $open-flags (eq $open-flags-type)))
    (type $descriptor-flags-type (flags "read" "write" "file-integrity-sync" "data-integrity-sync"
      "requested-write-sync" "mutate-directory"))
    (export "descriptor-flags" (type $descriptor-flags (eq $descriptor-flags-type)))
    (export "[method]descriptor.open-at" (func (param "self" (borrow $descriptor)) (param "path-flags" $path-flags)
      (param "path" string) (param "open-flags" $open-flags) (param "flags" $descriptor-flags)
      (result (result (own $descriptor) (error $error-code)))))
    (export "[method]descriptor.write" (func (param "self" (borrow $descriptor)) (param "buffer" (list u8))
      (param "offset" u64) (result (result u64 (error $error-code)))))
    (export "[method]descriptor.create-directory-at" (func (param "self" (borrow $descriptor)) (param "path" string)
      (result (result (error $error-code)))))
    (export "[method]descriptor.unlink-file-at" (func (param "self" (borrow $descriptor)) (param "path" string)
      (result (result (error $error-code)))))
    (export "[method]descriptor.symlink-at" (func (param "self" (borrow $descriptor)) (param "old-path" string)
      (param "new-path" string) (result (result (error $error-code)))))
    (export "[method]descriptor.rename-at" (func (param "self" (borrow $descriptor)) (param "old-path" string)
      (param "new-descriptor" (borrow $descriptor)) (param "new-path" string) (result (result (error $error-code)))))))
  (alias export $types "descriptor" (type $descriptor))
  (import "wasi:filesystem/preopens@0.2.0" (instance $preopens
    (alias outer 1 $descriptor (type $outer))
    (export "descriptor" (type $descriptor (eq $outer)))
    (export "get-directories" (func (result (list (tuple (own $descriptor) string)))))))

  (core module $libc
    (memory (export "memory") 1)
    (global $free (mut i32) (i32.const 4096))
    (func (export "realloc") (param i32 i32 i32) (param $size i32) (result i32)
      (global.get $free)
      (global.set $free (i32.and (i32.add (i32.add (global.get $free) (local.get $size)) (i32.const 7)) (i32.const -8)))))
  (core instance $libc (instantiate $libc))

  (core func $get-stderr (canon lower (func $stderr "get-stderr")))
  (core func $flush (canon lower (func $streams "[method]output-stream.blocking-write-and-flush") (memory (core memory $libc "memory"))))
  (core func $directories (canon lower (func $preopens "get-directories")
    (memory (core memory $libc "memory")) (realloc (core func $libc "realloc"))))
  (core func $open (canon lower (func $types "[method]descriptor.open-at") (memory (core memory $libc "memory"))))
  (core func $write (canon lower (func $types "[method]descriptor.write") (memory (core memory $libc "memory"))))
  (core func $make (canon lower (func $types "[method]descriptor.create-directory-at") (memory (core memory $libc "memory"))))
  (core func $unlink (canon lower (func $types "[method]descriptor.unlink-file-at") (memory (core memory $libc "memory"))))
  (core func $link (canon lower (func $types "[method]descriptor.symlink-at") (memory (core memory $libc "memory"))))
  (core func $rename (canon lower (func $types "[method]descriptor.rename-at") (memory (core memory $libc "memory"))))

  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "get-stderr" (func $get-stderr (result i32)))
    (import "host" "flush" (func $flush (param i32 i32 i32 i32)))
    (import "host" "directories" (func $directories (param i32)))
    (import "host" "open" (func $open-at (param i32 i32 i32 i32 i32 i32 i32)))
    (import "host" "write" (func $write-at (param i32 i32 i32 i64 i32)))
    (import "host" "make" (func $make-at (param i32 i32 i32 i32)))
    (import "host" "unlink" (func $unlink-at (param i32 i32 i32 i32)))
    (import "host" "link" (func $link-at (param i32 i32 i32 i32 i32 i32)))
    (import "host" "rename" (func $rename-at (param i32 i32 i32 i32 i32 i32 i32)))
    ;; 0: where results go. 64: what is written. 128: PATH. 1024: the path of what is made.
    (data (i32.const 64) "ok")
    (data (i32.const 128) "PATH")
    (data (i32.const 1024) "made")
    (global $root (mut i32) (i32.const 0))
    (func $report
      (call $flush (call $get-stderr) (i32.const 64) (i32.const 2) (i32.const 0)))
    (func $check (param $code-at i32)
      (if (i32.load8_u (i32.const 0))
        (then
          (i32.store8 (i32.const 64) (i32.add (i32.const 48) (i32.div_u (i32.load8_u (local.get $code-at)) (i32.const 10))))
          (i32.store8 (i32.const 65) (i32.add (i32.const 48) (i32.rem_u (i32.load8_u (local.get $code-at)) (i32.const 10)))))))
    ;; Opens PATH; what can be written to is written to.
    (func $open (param $flags i32) (param $descriptor-flags i32)
      (call $open-at (global.get $root) (i32.const 1) (i32.const 128) (i32.const LENGTH) (local.get $flags)
        (local.get $descriptor-flags) (i32.const 0))
      (call $check (i32.const 4))
      (if (i32.and (i32.eqz (i32.load8_u (i32.const 0))) (i32.eq (local.get $descriptor-flags) (i32.const 2)))
        (then
          (call $write-at (i32.load (i32.const 4)) (i32.const 64) (i32.const 2) (i64.const 0) (i32.const 0))
          (call $check (i32.const 8)))))
    (func $make
      (call $make-at (global.get $root) (i32.const 1024) (i32.const 4) (i32.const 0))
      (call $check (i32.const 1)))
    (func $unlink
      (call $unlink-at (global.get $root) (i32.const 128) (i32.const LENGTH) (i32.const 0))
      (call $check (i32.const 1)))
    (func $link
      (call $link-at (global.get $root) (i32.const 128) (i32.const LENGTH) (i32.const 1024) (i32.const 4) (i32.const 0))
      (call $check (i32.const 1)))
    (func $rename
      (call $rename-at (global.get $root) (i32.const 128) (i32.const LENGTH) (global.get $root) (i32.const 1024) (i32.const 4)
        (i32.const 0))
      (call $check (i32.const 1)))
    (func (export "run") (result i32)
      (call $directories (i32.const 0))
      (global.set $root (i32.load (i32.load (i32.const 0))))
      OPERATION
      (call $report)
      (i32.const 0)))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance
      (export "get-stderr" (func $get-stderr)) (export "flush" (func $flush)) (export "directories" (func $directories))
      (export "open" (func $open)) (export "write" (func $write)) (export "make" (func $make))
      (export "unlink" (func $unlink)) (export "link" (func $link)) (export "rename" (func $rename))))))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $cli (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $cli)))
