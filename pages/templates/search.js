// What the pages need a script for: dropping photos on them, and "/" to jump to the search box.
"use strict";

// A gallery that can't be asked in words, or by a photo, lacks that form.
const form = document.querySelector("form.photo");
const input = document.getElementById("photo");
const words = document.getElementById("q");

input?.addEventListener("change", () => {
  if (input.files.length) form.requestSubmit();
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();  // otherwise the browser would open the photo
  if (!form) return;
  document.body.classList.add("dropping");
});

document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});

document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (!form || !event.dataTransfer.files.length) return;
  const first = new DataTransfer();  // the form takes one photo
  first.items.add(event.dataTransfer.files[0]);
  input.files = first.files;
  form.requestSubmit();
});

document.addEventListener("keydown", (event) => {
  if (!words || event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target instanceof HTMLInputElement) return;
  event.preventDefault();
  words.select();
});
